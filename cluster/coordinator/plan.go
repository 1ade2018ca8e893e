package coordinator

import (
	"fmt"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/placement"
	"firn.io/firn/internal/block"
)

// groupFraction: a group should hold at most the 20th part (5 %) of its smallest
// disk, so that moving one is a small step.
const groupFraction = 20

// layout is what is to be done for a volume that lacks spans. Exactly one of
// the fields is set.
type layout struct {
	create  [][]meta.Place
	spans   [][]block.GroupID
	waiting string
}

// plan decides on the next step of a volume that lacks spans: new groups if
// there are too few, or its spans if all groups for them are ready.
func (w *view) plan(v meta.VolumeMeta, maxGroupsPerDisk int) layout {
	registered := w.disks(maxGroupsPerDisk, false)
	if n := nodesOf(registered); n < v.Replicas {
		return layout{waiting: fmt.Sprintf("%d replicas need %d nodes with a working disk, the cluster has %d", v.Replicas, v.Replicas, n)}
	}
	width := placement.Width(nodesOf(registered))
	var shares []int64
	for s := len(v.Spans); s < meta.SpansFor(targetBytes(v)); s++ {
		shares = append(shares, spanBytes(v, s)/int64(width))
	}

	groups, ready := w.candidates(v.Replicas)
	live := w.disks(maxGroupsPerDisk, true)
	newLimit := int64(1 << 62)
	for _, d := range live {
		newLimit = min(newLimit, limitOf(d.CapacityBytes))
	}
	budget := width * len(shares)
	p := placement.PlanSpans(groups[:ready], width, shares, newLimit, budget)
	if p.New > 0 { // count on those that are coming
		p = placement.PlanSpans(groups, width, shares, newLimit, budget)
	}
	places := placement.PlaceGroups(live, v.Replicas, min(p.New, meta.MaxNewGroups))
	if len(places) > 0 {
		return layout{create: toPlaces(places)}
	}
	if p.New > 0 { // no room for new groups: the others take more
		if len(groups) < width && nodesOf(live) < v.Replicas {
			return layout{waiting: fmt.Sprintf("%d replicas need %d nodes that are up, %d are", v.Replicas, v.Replicas, nodesOf(live))}
		}
		p = placement.PlanSpans(groups, width, shares, newLimit, 0)
	}
	var spans [][]block.GroupID
	for _, span := range p.Spans {
		if len(span) == 0 {
			return layout{waiting: "no disk may take another group"}
		}
		var ids []block.GroupID
		for _, i := range span {
			if i >= ready {
				return layout{waiting: "the nodes create its groups"}
			}
			ids = append(ids, groups[i].ID)
		}
		spans = append(spans, ids)
	}
	return layout{spans: spans}
}

func toPlaces(groups [][]placement.Disk) [][]meta.Place {
	out := make([][]meta.Place, len(groups))
	for i, g := range groups {
		for _, d := range g {
			out[i] = append(out[i], meta.Place{Node: d.Node, Disk: d.Disk})
		}
	}
	return out
}
