"""What a model is judged by: the loss of texts, by source and by position, long-range retrieval; and its report."""
