"""What a device's memory is best spent on under the rule `carry`."""
