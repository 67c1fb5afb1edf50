"""Other libraries and services, made to work with the models: one module for each."""
