//! From a device name to a burn device.
