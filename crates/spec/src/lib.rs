//! Text to desired state.
