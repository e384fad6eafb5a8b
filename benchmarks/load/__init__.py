"""A coordinator process under load: devices by the thousand, kills, heartbeats while it merges."""
