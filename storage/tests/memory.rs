//! The memory driver against the one suite.
#![allow(clippy::unwrap_used)]

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use async_trait::async_trait;
use flocker_storage::{
    conformance::{self, Fixture},
    driver::Driver,
    drivers::{self, memory::MemoryPool},
    error::Result,
};

static PLACES: AtomicU32 = AtomicU32::new(0);

/// Pools of this process, under names of their own.
struct Memory(u32);

#[async_trait]
impl Fixture for Memory {
    async fn open(&self, pool: &str) -> Result<Arc<dyn Driver>> {
        drivers::open(&format!("memory:conformance-{}-{pool}", self.0).parse().unwrap()).await
    }

    fn plant_stranger(&self, _pool: &str) -> bool {
        false
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for pool in ["a", "b"] {
            MemoryPool::discard(&format!("conformance-{}-{pool}", self.0));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_passes() {
    conformance::run(|| Memory(PLACES.fetch_add(1, Ordering::Relaxed))).await;
}
