"""One block: convolution, normalisation, activation, dropout and FiLM, as modules and users call it."""

from .prepared import PreparedWeight
from .run import Call, run
from .tail import Moving
