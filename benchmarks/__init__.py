"""Programs that measure; `quartet bench` lists and runs them. They are scripts: nothing is imported from here."""
