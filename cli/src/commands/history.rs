//! `log`.

use std::collections::BTreeMap;

use clap::Args;
use flocker_node::api::{
    client::VolumeName,
    types::{HistoryHost, HistoryNode, HistoryResource, HostAnswer},
};

use super::Session;
use crate::{graph, output::human_bytes};

#[derive(Debug, Args)]
pub(super) struct LogArgs {
    /// The volume
    volume: VolumeName,
    /// Draw branches and merges
    #[arg(long)]
    graph: bool,
    /// Ask all peers, and mark which host holds what
    #[arg(long)]
    all_hosts: bool,
}

impl Session<'_> {
    pub(super) async fn log(&self, args: LogArgs) -> anyhow::Result<()> {
        let history = self.client.history(&args.volume, args.all_hosts).await?;
        self.output.item(&history, || shown(&history, args.graph))?;
        for host in history.hosts.iter().filter(|host| host.answer == HostAnswer::Unreachable) {
            let why = host.why.as_deref().unwrap_or("no answer");
            self.output.talk(&format!("warning: what {} holds is not known: {why}", host.host));
        }
        Ok(())
    }
}

/// The snapshots with the nearest ancestors that are there in place of parents that were destroyed.
fn joined(history: &HistoryResource) -> Vec<HistoryNode> {
    let mut nodes = history.nodes.clone();
    let places: BTreeMap<_, usize> = nodes.iter().enumerate().map(|(at, node)| (node.id, at)).collect();
    nodes.iter_mut().for_each(|node| node.parents.clear());
    for edge in &history.edges {
        if let Some(&at) = places.get(&edge.child) {
            nodes[at].parents.push(edge.parent);
        }
    }
    nodes
}

fn shown(history: &HistoryResource, graph: bool) -> String {
    let describe = |node: &HistoryNode| {
        let places: Vec<String> = node.held_by.iter().map(|place| format!("{}:{}", place.host, place.volume)).collect();
        let created = node.created.strftime("%Y-%m-%d %H:%M:%S UTC");
        let size = human_bytes(node.logical_bytes);
        let same = if node.unchanged { ", unchanged" } else { "" };
        format!(
            "{} ({})  written on {} at {created}, {size}{same}  [{}]",
            node.name,
            node.id.short(),
            node.host,
            places.join(" ")
        )
    };
    let nodes = joined(history);
    let mut text = if graph {
        graph::draw(&nodes, describe)
    } else {
        graph::newest_first(&nodes).into_iter().map(|node| describe(node) + "\n").collect()
    };
    if history.hosts.len() > 1 {
        text.push('\n');
        history.hosts.iter().for_each(|host| text.push_str(&host_line(history, host)));
    }
    text
}

fn host_line(history: &HistoryResource, host: &HistoryHost) -> String {
    let name = |id| history.nodes.iter().find(|node| Some(node.id) == id).map(|node| node.name.to_string());
    let what = match host.answer {
        HostAnswer::Unreachable => "does not answer: what it holds is not known".to_owned(),
        HostAnswer::Nothing => format!("has no volume {}", history.volume),
        HostAnswer::OtherVolume => format!("has another volume of the name {}", history.volume),
        HostAnswer::Holds => {
            let tip = name(host.tip).unwrap_or_else(|| "no snapshot".to_owned());
            let role = host.role.map(|role| role.to_string()).unwrap_or_default();
            let epoch = host.epoch.unwrap_or_default();
            let behind = match (host.behind, name(host.common)) {
                (Some(0), _) => String::new(),
                (Some(count), Some(common)) => format!(", {count} behind (newest in common: {common})"),
                _ => ", nothing in common".to_owned(),
            };
            format!("{role}, epoch {epoch}, at {tip}{behind}")
        }
    };
    format!("{}: {what}\n", host.host)
}
