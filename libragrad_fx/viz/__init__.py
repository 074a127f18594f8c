"""Results for people: heat maps, gradient graphs, the demo page, text."""
