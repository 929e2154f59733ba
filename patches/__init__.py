"""Load-time patches: other packages' own, unmodified scripts run with compressed visual tokens."""
