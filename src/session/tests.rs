//! Both machines against each other, and against absurd peers.
