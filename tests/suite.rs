//! Integration suite placeholder.
#[test]
fn placeholder() {}
