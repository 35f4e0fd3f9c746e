"""The device agent: Flower ClientApp and one round on one device."""
