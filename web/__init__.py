"""What stands between HTTP and the batcher: requests and answers, limits, metrics, and the page."""
