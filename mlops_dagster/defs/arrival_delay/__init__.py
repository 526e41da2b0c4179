"""How many minutes late will a departing flight arrive? The second model on the data and the features of flight_delay."""
