//! The one integration binary: each concern is a module of its own.

mod floors;
