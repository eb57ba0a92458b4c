"""What no paper could change: data sets, networks, evaluation, options, run plumbing."""
