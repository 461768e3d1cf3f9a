//! The agent's only unsafe code: system calls that no safe wrapper offers.
#![allow(unsafe_code)]

pub mod child;
pub mod device;
pub mod pages;
