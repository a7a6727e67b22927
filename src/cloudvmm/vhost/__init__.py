"""The back end's side of vhost-user: messages, the guest's memory, its rings. No device is here."""
