"""What a person looks at: heat maps and the demo page. Arrays and text in, pictures and text out."""
