"""What a network is, found on shapes alone (torch's meta device): does it fit its input, and what is it made of."""
