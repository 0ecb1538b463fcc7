"""What is trained on and measured on: labelled pictures, where they come from, and how a net sees them."""
