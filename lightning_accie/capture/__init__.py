"""What happens during `fit`, as records."""
