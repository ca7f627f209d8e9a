//! A long lineage in few bytes: what the other side knows already travels as digests and places, not as records.
//!
//! Owns how a lineage is cut into blocks, how an offer leaves out what the receiver holds in the same way, and how an answer points into
//! the offer instead of repeating it. Refuses to judge histories ([`crate::divergence`] does, on whole lineages).
//!
//! A lineage of more than [`WHOLE_LIMIT`] snapshots is offered as its newest snapshots and an outline of those before them: the
//! digest of each block. Blocks end where a snapshot's id says so, so that a snapshot that one side has destroyed changes one
//! block and not all that follow. The receiver fills in the blocks that its own lineage has too, and asks for the others.

use std::collections::HashMap;

use flocker_storage::model::{HeldSnapshot, Lineage, SnapshotId};
use serde::{Deserialize, Serialize};

use crate::message::{LINEAGE_LIMIT, demand};

/// Up to so many snapshots a lineage is offered as it is.
pub const WHOLE_LIMIT: usize = 256;
/// A block has about so many snapshots: one id in so many, by its last byte, is the last of a block. A power of two.
const BLOCK: u8 = 64;
/// No block has more, whatever the ids.
const BLOCK_LIMIT: usize = 512;
/// So many of the newest snapshots travel as records at least, so that a receiver that is a little behind need not ask.
const NEWEST: usize = 32;

/// Some snapshots in a row, by their digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Block {
    /// The first half of the BLAKE3 of their records as they travel, without metadata.
    pub digest: [u8; 16],
    /// How many they are.
    pub count: u32,
}

/// A part of a lineage that is answered to one that the other side has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Piece {
    /// 0: so many of the other side's snapshots, as it has them, beginning with the one at this place.
    Offered {
        /// Counts from 0, the oldest.
        first: u32,
        /// How many.
        count: u32,
    },
    /// 1: others.
    Own(Vec<HeldSnapshot>),
}

fn ends_block(id: SnapshotId) -> bool {
    id.0.as_bytes()[15] & (BLOCK - 1) == 0
}

fn blocks(snapshots: &[HeldSnapshot]) -> impl Iterator<Item = &[HeldSnapshot]> {
    let mut rest = snapshots;
    std::iter::from_fn(move || {
        let within = &rest[..rest.len().min(BLOCK_LIMIT)];
        let end = within.iter().position(|held| ends_block(held.snapshot.id)).map_or(within.len(), |last| last + 1);
        let (block, behind) = rest.split_at(end);
        rest = behind;
        (!block.is_empty()).then_some(block)
    })
}

fn outlined(snapshots: &[HeldSnapshot]) -> Block {
    let mut hasher = blake3::Hasher::new();
    for held in snapshots {
        // Records are read back to the same bytes; a failure would only make a digest that nobody else has.
        hasher.update(&postcard::to_stdvec(held).unwrap_or_default());
    }
    let mut digest = [0; 16];
    digest.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    Block { digest, count: snapshots.len() as u32 }
}

/// Cuts a long lineage, which has no metadata, into the outline of its older part and its newest snapshots. Nothing is left out of a
/// short one, nor of one whose wanted snapshot is not among the newest.
pub fn cut(mut lineage: Lineage, want: SnapshotId) -> (Vec<Block>, Lineage) {
    let snapshots = &lineage.snapshots;
    if snapshots.len() <= WHOLE_LIMIT {
        return (Vec::new(), lineage);
    }
    let (mut older, mut count) = (Vec::new(), 0);
    for block in blocks(snapshots) {
        if count + block.len() + NEWEST > snapshots.len() {
            break;
        }
        older.push(outlined(block));
        count += block.len();
    }
    if !snapshots[count..].iter().any(|held| held.snapshot.id == want) {
        return (Vec::new(), lineage);
    }
    lineage.snapshots.drain(..count);
    (older, lineage)
}

/// Outlines a whole lineage, which has no metadata.
pub fn outline(lineage: &Lineage) -> Vec<Block> {
    blocks(&lineage.snapshots).map(outlined).collect()
}

/// Returns the snapshots of some blocks of a lineage's outline.
pub fn of_blocks(lineage: &Lineage, wanted: &[u32]) -> Vec<HeldSnapshot> {
    let blocks: Vec<_> = blocks(&lineage.snapshots).collect();
    wanted.iter().filter_map(|block| blocks.get(*block as usize)).flat_map(|block| block.iter().cloned()).collect()
}

/// An offered lineage while it is put together again.
#[derive(Debug)]
pub struct Puzzle {
    older: Vec<Block>,
    found: Vec<Option<Vec<HeldSnapshot>>>,
}

impl Puzzle {
    /// Fills in what a lineage of the receiver's, without metadata, has in the same way.
    pub fn begin(older: Vec<Block>, own: &Lineage) -> Self {
        let known: HashMap<[u8; 16], &[HeldSnapshot]> =
            blocks(&own.snapshots).map(|block| (outlined(block).digest, block)).collect();
        let found = |block: &Block| known.get(&block.digest).map(|snapshots| snapshots.to_vec());
        Self { found: older.iter().map(found).collect(), older }
    }

    /// Returns the places of the blocks that are not there yet.
    pub fn missing(&self) -> Vec<u32> {
        (0..).zip(&self.found).filter(|(_, found)| found.is_none()).map(|(place, _)| place).collect()
    }

    /// Takes in the snapshots of all blocks that were [`missing`](Self::missing), and returns the lineage with the newest at its end.
    /// Fails where they are not what the outline says.
    pub fn finish(mut self, sent: Vec<HeldSnapshot>, newest: Lineage) -> Result<Lineage, String> {
        let mut sent = sent.into_iter();
        for (block, found) in self.older.iter().zip(&mut self.found).filter(|(_, found)| found.is_none()) {
            let count = block.count as usize;
            demand(count <= sent.len(), || "it left out snapshots of its outline".to_owned())?;
            let snapshots: Vec<HeldSnapshot> = sent.by_ref().take(count).collect();
            demand(outlined(&snapshots) == *block, || "its snapshots are not those of its outline".to_owned())?;
            *found = Some(snapshots);
        }
        demand(sent.len() == 0, || "it sent snapshots that were not asked for".to_owned())?;
        let mut snapshots: Vec<HeldSnapshot> = self.found.into_iter().flatten().flatten().collect();
        snapshots.extend(newest.snapshots);
        Ok(Lineage { snapshots })
    }
}

/// Checks an outline that a peer sent.
pub(crate) fn check(older: &[Block]) -> Result<(), String> {
    let count: u64 = older.iter().map(|block| u64::from(block.count)).sum();
    demand(count <= LINEAGE_LIMIT as u64, || format!("its outline has {count} snapshots, {LINEAGE_LIMIT} at most"))?;
    demand(older.iter().all(|block| (1..=BLOCK_LIMIT).contains(&(block.count as usize))), || {
        format!("a block of its outline has not 1 to {BLOCK_LIMIT} snapshots")
    })
}

/// Writes a lineage down as far as it is not what was offered.
pub fn pack(lineage: &Lineage, offered: &Lineage) -> Vec<Piece> {
    let places: HashMap<SnapshotId, u32> = offered.snapshots.iter().map(|held| held.snapshot.id).zip(0..).collect();
    let mut pieces: Vec<Piece> = Vec::new();
    for held in &lineage.snapshots {
        let place = places.get(&held.snapshot.id).copied();
        let place = place.filter(|place| offered.snapshots.get(*place as usize) == Some(held));
        match (pieces.last_mut(), place) {
            (Some(Piece::Offered { first, count }), Some(place)) if *first + *count == place => *count += 1,
            (_, Some(first)) => pieces.push(Piece::Offered { first, count: 1 }),
            (Some(Piece::Own(own)), None) => own.push(held.clone()),
            (_, None) => pieces.push(Piece::Own(vec![held.clone()])),
        }
    }
    pieces
}

/// Writes a lineage down as far as the blocks of its outline are not those of another. [`unpack`] beside that other undoes it.
pub fn pack_beside(lineage: &Lineage, other: &[Block]) -> Vec<Piece> {
    let mut place = 0;
    let places: HashMap<Block, u32> = other
        .iter()
        .map(|block| {
            let first = place;
            place += block.count;
            (*block, first)
        })
        .collect();
    let mut pieces: Vec<Piece> = Vec::new();
    for block in blocks(&lineage.snapshots) {
        let outlined = outlined(block);
        match (pieces.last_mut(), places.get(&outlined)) {
            (Some(Piece::Offered { first, count }), Some(place)) if *first + *count == *place => {
                *count += outlined.count;
            }
            (_, Some(first)) => pieces.push(Piece::Offered { first: *first, count: outlined.count }),
            (Some(Piece::Own(own)), None) => own.extend_from_slice(block),
            (_, None) => pieces.push(Piece::Own(block.to_vec())),
        }
    }
    pieces
}

/// Undoes [`pack`]. Fails where a piece points beyond what was offered, or there are more than [`LINEAGE_LIMIT`].
pub fn unpack(pieces: Vec<Piece>, offered: &Lineage) -> Result<Lineage, String> {
    let mut snapshots: Vec<HeldSnapshot> = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Own(own) => snapshots.extend(own),
            Piece::Offered { first, count } => {
                let (first, count) = (first as usize, count as usize);
                let same = first.checked_add(count).and_then(|end| offered.snapshots.get(first..end));
                let same = same
                    .ok_or_else(|| format!("it points at {count} snapshots from {first} on, which were not offered"))?;
                demand(snapshots.len() + count <= LINEAGE_LIMIT, || {
                    format!("its lineage has more than {LINEAGE_LIMIT} snapshots")
                })?;
                snapshots.extend_from_slice(same);
            }
        }
    }
    Ok(Lineage { snapshots })
}
