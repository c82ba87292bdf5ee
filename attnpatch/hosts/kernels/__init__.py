"""How the functions of kernel packages are called, and putting overridable functions in their places."""
