"""The methods: one file each, with the loss in plain sight."""
