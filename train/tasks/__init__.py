"""What can be trained for: each task reads its examples and knows its loss and its metrics."""
