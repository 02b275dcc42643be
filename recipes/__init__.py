"""Short, complete recipes: model, task, data and defaults, each with a YAML beside it. Import them freely."""
