// Package placement decides where things go. It is pure: from what is known it
// computes a choice, the same for the same input, and changes nothing. The
// coordinator supplies the facts and writes the choices.
package placement

import (
	"cmp"
	"slices"

	"firn.io/firn/internal/block"
)

// The bounds of a span's width.
const (
	MinWidth = 4
	MaxWidth = 32
)

// Width is how many groups a new span is spread over, in a cluster of so many nodes.
func Width(nodes int) int { return min(max(2*nodes, MinWidth), MaxWidth) }

// Disk is a place for replicas.
type Disk struct {
	Node          block.NodeID
	Zone          string // "" is a zone of its own kind: that of nodes without one
	Disk          block.DiskID
	CapacityBytes int64
	// Replicas is how many it holds.
	Replicas int
	// Room is how many more it may take.
	Room int
}

// load is how full of replicas a disk would be with one more, by its capacity.
func (d *Disk) load() float64 { return float64(d.Replicas+1) / float64(max(d.CapacityBytes, 1)) }

// PlaceGroups chooses disks for the replicas of up to n new groups: distinct
// nodes, as many zones as there are, each time the disks that hold the fewest
// replicas for their capacity. It returns fewer groups when room runs out, and
// none when there are fewer nodes with room than replicas.
func PlaceGroups(disks []Disk, replicas, n int) [][]Disk {
	disks = slices.Clone(disks)
	var out [][]Disk
	for range n {
		chosen := placeOne(disks, replicas)
		if chosen == nil {
			return out
		}
		group := make([]Disk, replicas)
		for i, at := range chosen {
			group[i] = disks[at]
			disks[at].Replicas++
			disks[at].Room--
		}
		out = append(out, group)
	}
	return out
}

// placeOne returns the indexes of the disks of one group's replicas, or nil.
func placeOne(disks []Disk, replicas int) []int {
	return place(disks, nil, replicas)
}

// PlaceReplica chooses the disk of a replica beside others of its group, as
// PlaceGroups does; false if none has room.
func PlaceReplica(disks, others []Disk) (Disk, bool) {
	chosen := place(disks, others, 1)
	if chosen == nil {
		return Disk{}, false
	}
	return disks[chosen[0]], true
}

func place(disks, others []Disk, replicas int) []int {
	var chosen []int
	inZone := map[string]int{}
	onNode := map[block.NodeID]bool{}
	for _, d := range others {
		inZone[d.Zone]++
		onNode[d.Node] = true
	}
	for len(chosen) < replicas {
		best := -1
		for i := range disks {
			d := &disks[i]
			if d.Room <= 0 || onNode[d.Node] {
				continue
			}
			if best < 0 || preferred(d, &disks[best], inZone) {
				best = i
			}
		}
		if best < 0 {
			return nil
		}
		chosen = append(chosen, best)
		inZone[disks[best].Zone]++
		onNode[disks[best].Node] = true
	}
	return chosen
}

// preferred tells whether a goes before b: first a zone with fewer replicas of
// this group, then the emptier disk, then the lower ids.
func preferred(a, b *Disk, inZone map[string]int) bool {
	return cmp.Or(
		cmp.Compare(inZone[a.Zone], inZone[b.Zone]),
		cmp.Compare(a.load(), b.load()),
		cmp.Compare(a.Node, b.Node),
		slices.Compare(a.Disk[:], b.Disk[:]),
	) < 0
}

// Group is a group that spans can be given to.
type Group struct {
	ID block.GroupID
	// LoadBytes is the part of volumes' sizes that it holds, LimitBytes how much
	// that should be at most (5 % of its smallest disk).
	LoadBytes, LimitBytes int64
}

// hasRoom tells whether the group should take so much more. An empty group
// always does: no number of further groups would help a share above the limit.
func (g *Group) hasRoom(share int64) bool {
	return g.LoadBytes == 0 || g.LoadBytes+share <= g.LimitBytes
}

// Plan is what PlanSpans decided. Spans holds indexes into the groups that were
// given; those at and beyond their number stand for groups that do not exist
// yet, of which there are New.
type Plan struct {
	Spans [][]int
	New   int
}

// PlanSpans spreads spans over groups, each over the width least loaded ones.
// shares are the bytes that each group of the respective span gets. Where fewer
// than width groups have room, up to budget new ones are planned, with newLimit
// as their limit; beyond that, groups get more than they should. A span is
// narrower than width only if there are not that many groups at all.
func PlanSpans(groups []Group, width int, shares []int64, newLimit int64, budget int) Plan {
	all := slices.Clone(groups)
	var p Plan
	for _, share := range shares {
		roomy := 0
		for i := range all {
			if all[i].hasRoom(share) {
				roomy++
			}
		}
		for ; roomy < width && p.New < budget; roomy++ {
			all = append(all, Group{LimitBytes: newLimit})
			p.New++
		}
		span := leastLoaded(all, width, share)
		for _, i := range span {
			all[i].LoadBytes += share
		}
		p.Spans = append(p.Spans, span)
	}
	return p
}

// leastLoaded returns the indexes of up to width groups: those with room first,
// then by load, then in the order given.
func leastLoaded(all []Group, width int, share int64) []int {
	order := make([]int, len(all))
	for i := range order {
		order[i] = i
	}
	full := func(i int) int {
		if all[i].hasRoom(share) {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(order, func(a, b int) int {
		return cmp.Or(cmp.Compare(full(a), full(b)), cmp.Compare(all[a].LoadBytes, all[b].LoadBytes))
	})
	return order[:min(width, len(order))]
}
