//! The binary as users run it: real servers, proxies, shims and programs, in a hermetic home per test.
//!
//! | module | what it proves |
//! |---|---|
//! | [`tour`] | every command does what it says, with its exit codes and JSON |
//! | [`order`] | dependencies, checks, and what a lost dependency means |
//! | [`load`] | no request and no stream is lost while releases roll and parts are killed |
//! | [`rollouts`] | canary, blue-green and hold, with verdicts, people, newer releases and crashes |
//! | [`verdicts`] | real canaries, good and bad, get the verdict that the figures promise |
//! | [`deploys`] | deploys of every strategy under load, with faults in a third of them: no request is lost |
//! | [`scaling`] | a service that sleeps, is woken, grows and shrinks: no request is lost |
//! | [`streams`] | long token streams and WebSockets live across deploys; those that must be cut are told so |
//! | [`flags`] | feature flags: changes without a restart, overrides, answers while parts are dead |
//! | [`previews`] | environments made from another one: what they share, what is their own, and their end |
//! | [`kill`] | any part killed at random moments: the next command converges |
//! | [`kill_rollouts`] | the server killed at random moments of rollouts: all old or all new, nothing twice |
//! | [`boundary`] | the server killed at every single journal boundary of an `up` |
//! | [`clock`] | the wall clock of a running server is set forwards and back |
//! | [`hostile`] | two of everything, full disks, garbage, replaced binaries, huge and escaping output |
//! | [`readme`] | the tour of the README, and every command that the book names |
//! | [`remote`] | the API over TCP with a token; everything is there again after a reboot |
//! | [`llm_chat`] | a real language model behind a stable address, updated in the middle of a stream |
//! | [`terminal`] | the live tree on a real terminal, and Ctrl-C on it |
//! | [`tls`] | certificates of the development authority and from files, through the real binary |
//! | [`traffic`] | limits, ejection, fallback and pauses of a stack's traffic, through the real binary |
//! | [`torture`] | programs that do not want to die, and every byte they write |

mod boundary;
mod clock;
mod consult;
mod deploys;
mod environment;
mod flags;
mod hostile;
mod kill;
mod kill_rollouts;
mod lanes;
mod llm_chat;
mod load;
mod order;
mod previews;
mod processes;
mod readme;
mod remote;
mod rollouts;
mod scaling;
mod secrets;
mod streams;
mod terminal;
mod tls;
mod torture;
mod tour;
mod traffic;
mod verdicts;
