//! Placeholder of model/hub.
