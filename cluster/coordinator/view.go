package coordinator

import (
	"cmp"
	"slices"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/placement"
	"firn.io/firn/internal/block"
)

// view is the catalog as the coordinator knows it: possibly old, never trusted
// without a transaction that compares. It keeps what plans need incrementally,
// so that one new volume does not cost a walk over all.
type view struct {
	volumes map[block.VolumeID]meta.VolumeMeta
	groups  map[block.GroupID]meta.GroupMeta
	nodes   map[block.NodeID]meta.NodeMeta
	live    map[block.NodeID]bool
	// load is what the volumes' sizes put on each group, in bytes.
	load map[block.GroupID]int64
	// pending are the volumes that something is to be done for.
	pending map[block.VolumeID]bool
}

func newView() *view {
	return &view{
		volumes: map[block.VolumeID]meta.VolumeMeta{}, groups: map[block.GroupID]meta.GroupMeta{},
		nodes: map[block.NodeID]meta.NodeMeta{}, live: map[block.NodeID]bool{},
		load: map[block.GroupID]int64{}, pending: map[block.VolumeID]bool{},
	}
}

func (w *view) putVolume(v meta.VolumeMeta) {
	w.dropVolume(v.ID)
	w.volumes[v.ID] = v
	w.addLoad(v, 1)
	if needsWork(v) {
		w.pending[v.ID] = true
	}
}

func (w *view) dropVolume(id block.VolumeID) {
	if old, ok := w.volumes[id]; ok {
		w.addLoad(old, -1)
	}
	delete(w.volumes, id)
	delete(w.pending, id)
}

func needsWork(v meta.VolumeMeta) bool { return v.State != meta.Ready || missingSpans(v) > 0 }

// targetBytes is the size that the volume's spans are to cover.
func targetBytes(v meta.VolumeMeta) int64 { return max(v.SizeBytes, v.WantBytes) }

func missingSpans(v meta.VolumeMeta) int {
	return max(meta.SpansFor(targetBytes(v))-len(v.Spans), 0)
}

// spanBytes is how much of the volume lies in span s.
func spanBytes(v meta.VolumeMeta, s int) int64 {
	return max(min(targetBytes(v)-int64(s)*block.SpanBytes, block.SpanBytes), 0)
}

func (w *view) addLoad(v meta.VolumeMeta, sign int64) {
	for s, span := range v.Spans {
		share := spanBytes(v, s) / int64(len(span))
		for _, g := range span {
			w.load[g] += sign * share
		}
	}
}

// work returns the volumes that something is to be done for, in a fixed order.
func (w *view) work() []meta.VolumeMeta {
	out := make([]meta.VolumeMeta, 0, len(w.pending))
	for id := range w.pending {
		out = append(out, w.volumes[id])
	}
	slices.SortFunc(out, func(a, b meta.VolumeMeta) int { return slices.Compare(a.ID[:], b.ID[:]) })
	return out
}

// disks returns the disks that new replicas may go to, in a fixed order: those
// of registered nodes that did not fail and are there; with liveOnly, of nodes
// that live now.
func (w *view) disks(maxGroupsPerDisk int, liveOnly bool) []placement.Disk {
	held := map[block.DiskID]int{}
	for _, g := range w.groups {
		for _, r := range g.Replicas {
			if !r.Lost {
				held[r.Disk]++
			}
		}
	}
	var out []placement.Disk
	for id, n := range w.nodes {
		if liveOnly && !w.live[id] {
			continue
		}
		for _, d := range n.Disks {
			if !d.Failed && !d.Absent {
				out = append(out, placement.Disk{Node: id, Zone: n.Zone, Disk: d.ID, CapacityBytes: d.CapacityBytes,
					Replicas: held[d.ID], Room: max(maxGroupsPerDisk-held[d.ID], 0)})
			}
		}
	}
	slices.SortFunc(out, func(a, b placement.Disk) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), slices.Compare(a.Disk[:], b.Disk[:]))
	})
	return out
}

func nodesOf(disks []placement.Disk) int {
	seen := map[block.NodeID]bool{}
	for _, d := range disks {
		seen[d.Node] = true
	}
	return len(seen)
}

// candidates are the groups of so many replicas that spans can be given to, in
// the order of their ids: first those that are ready, then those whose creation
// can still complete. ready is how many of the first kind there are.
func (w *view) candidates(replicas int) (out []placement.Group, ready int) {
	capacity := map[block.DiskID]int64{}
	healthy := map[block.DiskID]bool{}
	for id, n := range w.nodes {
		for _, d := range n.Disks {
			capacity[d.ID] = d.CapacityBytes
			healthy[d.ID] = w.live[id] && !d.Failed && !d.Absent
		}
	}
	var coming []placement.Group
	for id, g := range w.groups {
		if membersOf(g) != replicas {
			continue
		}
		well, possible, smallest := 0, true, int64(1<<62)
		for _, r := range g.Replicas {
			if r.Joining {
				continue
			}
			if healthy[r.Disk] && !r.Dead() {
				well++
			}
			possible = possible && !r.Dead() && (r.Created || healthy[r.Disk])
			smallest = min(smallest, capacity[r.Disk])
		}
		p := placement.Group{ID: id, LoadBytes: w.load[id], LimitBytes: limitOf(smallest)}
		switch {
		case g.Created() && well > replicas/2:
			out = append(out, p)
		case !g.Created() && possible:
			coming = append(coming, p)
		}
	}
	byID := func(a, b placement.Group) int { return cmp.Compare(a.ID, b.ID) }
	slices.SortFunc(out, byID)
	slices.SortFunc(coming, byID)
	return append(out, coming...), len(out)
}

// limitOf is how much a group should hold, from the capacity of its smallest disk.
func limitOf(capacityBytes int64) int64 { return capacityBytes / groupFraction }
