"""tokcredit inside host trainers. Each module imports its host, so each is imported only when asked for."""
