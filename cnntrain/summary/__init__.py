"""What a network is, found on shapes alone (the meta device): does it fit its input, what is it made of."""
