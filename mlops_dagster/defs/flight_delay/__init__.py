"""Will a departing flight arrive 15 minutes late or more? 336,776 real departures from New York City in 2013."""
