package node

import (
	"fmt"
	"time"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// health is what a gateway is told that asks how this node is.
func (n *Node) health() wire.NodeHealth {
	var h wire.NodeHealth
	for _, d := range n.disks {
		h.Disks = append(h.Disks, d.health())
	}
	for _, rep := range n.sorted() {
		h.Replicas++
		if err := rep.trouble(); err != nil {
			h.Halted++
			if h.HaltedReason == "" {
				h.HaltedReason = fmt.Sprintf("group %d replica %d: %v", rep.key.Group, rep.key.Replica, err)
			}
		}
	}
	h.Retired = uint32(len(n.retired))
	now := n.loop.Now()
	for _, waits := range []bool{false, true} { // those that run first: the rest may not fit
		for _, id := range sortedKeys(n.installs.all) {
			if in := n.installs.all[id]; in.active != waits {
				c := in.status(now)
				h.Copies = append(h.Copies, wire.CopyHealth{Group: id, Replica: in.rep.key.Replica, From: c.From, Done: uint32(c.Done), Total: uint32(c.Total),
					Bytes: c.Bytes, TotalBytes: c.TotalBytes, LeftSeconds: uint32(c.Left.Round(time.Second) / time.Second)})
			}
		}
	}
	n.served(&h)
	return h
}

// served adds which replicas take part in their groups, which do not that
// should, and what the volumes use in the groups that are led here.
func (n *Node) served(h *wire.NodeHealth) {
	given, missing := n.orders.given()
	h.Given, h.Missing = uint32(given), uint32(missing)
	used := map[block.VolumeID]int{}
	for _, rep := range n.sorted() {
		if rep.group == nil || rep.trouble() != nil {
			continue
		}
		leader, _, known := rep.group.Leader()
		h.Served = append(h.Served, wire.ServedReplica{Group: rep.key.Group, Replica: rep.key.Replica, Follows: known && leader != 0, Leads: rep.group.Leading()})
		if !rep.group.Leading() {
			continue
		}
		for _, v := range rep.state.Volumes() {
			i, ok := used[v]
			if !ok {
				i = len(h.Used)
				used[v], h.Used = i, append(h.Used, wire.VolumeUsage{Volume: v})
			}
			h.Used[i].Bytes += rep.state.Usage(v)
		}
	}
}

func (d *disk) health() wire.DiskHealth {
	h := wire.DiskHealth{Disk: d.id, State: wire.DiskOK, Corrupt: d.corrupt}
	if d.failed != nil {
		h.State, h.Reason = wire.DiskFailed, d.failed.Error()
		return h
	}
	sp := d.log.Space()
	h.RoomBytes, h.TakenBytes, h.LiveBytes, h.LogBytes = max(0, d.room()), max(0, d.taken()), sp.LiveBytes, sp.ClaimedBytes
	_, full := d.node.space.fullFrom[d.id]
	switch fill := h.Percent(); {
	case d.reserve.Short():
		h.State, h.Reason = wire.DiskFull, "full: others have filled its file system, and the index waits for room: writes are refused, reads go on. Make room in "+d.cfg.Dir
	case full || fill >= refusePercent:
		h.State, h.Reason = wire.DiskFull, fmt.Sprintf("%.0f %% full: writes are refused at %d %%", fill, refusePercent)
	case d.log.Stalled():
		h.State, h.Reason = wire.DiskFull, fmt.Sprintf("%.0f %% full: writes wait for a free segment of the log", fill)
	case fill >= slowPercent:
		h.State, h.Reason = wire.DiskSlow, fmt.Sprintf("%.0f %% full: writes are slowed from %d %%, and refused at %d %%", fill, slowPercent, refusePercent)
	case fill >= collectPercent:
		h.State, h.Reason = wire.DiskFilling, fmt.Sprintf("%.0f %% full: writes are slowed from %d %%, and refused at %d %%", fill, slowPercent, refusePercent)
	}
	if sp.Refused {
		h.State = max(h.State, wire.DiskSlow)
		if h.Reason != "" {
			h.Reason += "; "
		}
		h.Reason += "its file system has no room for another segment of the log"
	}
	return h
}
