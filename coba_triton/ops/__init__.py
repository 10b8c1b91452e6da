"""The operators: schemas, shapes, autograd and vmap rules, time blocks, validation."""
