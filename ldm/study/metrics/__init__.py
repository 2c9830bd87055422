"""The metrics of the paper and of the phantoms: tables and arrays in, numbers out."""
