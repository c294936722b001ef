"""Networks of the packages that ``fastfilm.convert`` knows: small ones, and every one that is counted."""
