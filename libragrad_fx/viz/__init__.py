"""What a person looks at: heat maps, the demo page, gradient graphs. Pictures and text out."""
