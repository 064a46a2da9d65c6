"""The broker: servicers over the store, held pulls, who is connected, registration with the namesrvs."""
