"""What every floor of the package stands on: plans, tokens and state. It needs torch alone."""
