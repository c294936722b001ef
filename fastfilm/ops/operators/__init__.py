"""The ``fastfilm::`` operators: schemas, shape functions, gradients, autocast rules."""
