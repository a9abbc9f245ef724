//! The client against a scripted server over a real socket.

mod client;
