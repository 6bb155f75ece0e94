"""Tables, figures and the report page, all from the record."""
