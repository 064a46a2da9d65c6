"""That `kitemq bench` measures what it says."""
