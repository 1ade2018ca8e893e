package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// replicaKey names a replica.
type replicaKey struct {
	group   block.GroupID
	replica block.ReplicaID
}

// servedReplicas is what the nodes say of the replicas that they serve.
type servedReplicas struct {
	alive map[block.NodeID]bool
	// told has a node that answered with all that it serves; a node that lives and
	// is not in it is taken at the metadata store's word.
	told map[block.NodeID]map[replicaKey]wire.ServedReplica
	// came has the nodes as they came up, with their disks, as far as known.
	came map[block.NodeID]*clusterpb.Node
}

func newServed() servedReplicas {
	return servedReplicas{alive: map[block.NodeID]bool{}, told: map[block.NodeID]map[replicaKey]wire.ServedReplica{}, came: map[block.NodeID]*clusterpb.Node{}}
}

func (s servedReplicas) tell(id block.NodeID, h *wire.NodeHealth) {
	if len(h.Served) == wire.MaxHealthReplicas {
		return // there may be more
	}
	all := make(map[replicaKey]wire.ServedReplica, len(h.Served))
	for _, r := range h.Served {
		all[replicaKey{r.Group, r.Replica}] = r
	}
	s.told[id] = all
}

// count tells whether r votes in its group, and whether it follows its leader.
func (s servedReplicas) count(g block.GroupID, r meta.ReplicaMeta) (votes, follows bool) {
	if r.Dead() || !s.alive[r.Node] {
		return false, false
	}
	all, told := s.told[r.Node]
	if !told {
		n := s.came[r.Node]
		there := n == nil || hasDisk(n, r.Disk)
		return there, there
	}
	found, ok := all[replicaKey{g, r.Replica}]
	return ok, ok && found.Follows
}

// condition is how the groups are.
type condition struct {
	all int
	// degraded lack a replica, or it does not follow the leader that others do;
	// stuck of these lack a majority.
	degraded, stuck []block.GroupID
	// electing have all replicas and no leader.
	electing []block.GroupID
	// unsettled: there are groups whose replicas all vote, and do not all follow.
	// An election does that for a moment.
	unsettled bool
}

func (s servedReplicas) condition(groups []meta.GroupMeta) condition {
	c := condition{all: len(groups)}
	for _, g := range groups {
		members, votes, follow := 0, 0, 0
		for _, r := range g.Replicas {
			if r.Joining {
				continue
			}
			members++
			v, f := s.count(g.ID, r)
			if v {
				votes++
			}
			if f {
				follow++
			}
		}
		c.unsettled = c.unsettled || votes == members && follow < members
		switch {
		case votes == members && follow == 0:
			c.electing = append(c.electing, g.ID)
		case follow < members:
			c.degraded = append(c.degraded, g.ID)
		}
		if 2*votes <= members {
			c.stuck = append(c.stuck, g.ID)
		}
	}
	slices.Sort(c.degraded)
	slices.Sort(c.stuck)
	return c
}

// problems tells a person of groups that are degraded.
func (c condition) problems() (out []*clusterpb.Problem) {
	if len(c.electing) > 0 {
		out = append(out, &clusterpb.Problem{Severity: "warning", What: fmt.Sprintf("%d of %d groups have no leader now, with all their replicas there", len(c.electing), c.all),
			Remedy: "they elect one within seconds; if it stays so, look at the network between the nodes"})
	}
	if len(c.degraded) == 0 {
		return out
	}
	p := &clusterpb.Problem{Severity: "error", What: fmt.Sprintf("%d of %d groups are degraded, %d have no majority", len(c.degraded), c.all, len(c.stuck)),
		Remedy: "stop no other node until they are whole: bring back the nodes that are down, and check that each node has its right disks (--disk) mounted"}
	if len(c.stuck) > 0 {
		p.What += fmt.Sprintf(" (%s): I/O to their chunks waits", nameGroups(c.stuck))
		p.Remedy = "bring back the nodes that are down, and those disks that nodes came up without; I/O resumes by itself. Where replicas are lost for good, see docs/repair.md"
	}
	return append(out, p)
}

// maxNamedGroups bounds the groups that a message names.
const maxNamedGroups = 8

func nameGroups(ids []block.GroupID) string {
	out := plural(len(ids), "group")
	for i, id := range ids {
		if i == maxNamedGroups {
			return out + fmt.Sprintf(" and %d more", len(ids)-i)
		}
		if i > 0 {
			out += ","
		}
		out += fmt.Sprintf(" %d", id)
	}
	return out
}

// missingProblem tells of replicas that a node should have.
func missingProblem(n *clusterpb.Node) *clusterpb.Problem {
	return &clusterpb.Problem{Severity: "error", What: fmt.Sprintf("node %d: %d of %d replicas that the cluster gives it are not on its disks", n.Id, n.MissingReplicas, n.GivenReplicas),
		Remedy: "check its --disk and what is mounted there, and start it again with the right disks. A disk that stays away is replaced by copies of the other replicas, as long as those are a majority"}
}

// Elections take less than a second: what is asked in one is asked again.
const (
	settleTries = 3
	settlePause = 300 * time.Millisecond
)

// wellness asks the nodes how they are and judges the groups by that, again for a
// while if an election may be under way.
func (s *served) wellness(ctx context.Context, groups []meta.GroupMeta) (nodes []*clusterpb.Node, w wellness, c condition, err error) {
	for try := 1; ; try++ {
		if nodes, err = s.nodes(ctx); err != nil {
			return nil, w, c, err
		}
		w = s.addHealth(ctx, nodes)
		if c = w.served.condition(groups); !c.unsettled || try == settleTries {
			return nodes, w, c, nil
		}
		select {
		case <-time.After(settlePause):
		case <-ctx.Done():
			return nodes, w, c, nil
		}
	}
}

// askNodes asks the nodes how they are, all at once. errs has why one did not tell.
func (s *served) askNodes(ctx context.Context, ids []block.NodeID) (answers []wire.NodeHealth, errs []error) {
	answers, errs = make([]wire.NodeHealth, len(ids)), make([]error, len(ids))
	var wait sync.WaitGroup
	for i, id := range ids {
		wait.Go(func() {
			answers[i], errs[i] = call(ctx, s.loop, func(done func(wire.NodeHealth, error)) {
				s.catalog.client.NodeHealth(ctx, id, done)
			}, nil)
		})
	}
	wait.Wait()
	return answers, errs
}

// readyAskTime bounds what nodes are asked for a probe of readiness.
const readyAskTime = 300 * time.Millisecond

// groupsReady tells that groups have no majority, or nil: the nodes are asked what
// they serve. One that answers lives, also without a lease.
func (s *served) groupsReady(ctx context.Context, live map[block.NodeID]meta.LiveMeta) error {
	groups, err := meta.ListGroups(ctx, s.store)
	if err != nil {
		return err
	}
	seen := newServed()
	var ids []block.NodeID
	for _, g := range groups {
		for _, r := range g.Replicas {
			if !slices.Contains(ids, r.Node) {
				ids = append(ids, r.Node)
			}
		}
	}
	asking, cancel := context.WithTimeout(ctx, readyAskTime)
	defer cancel()
	answers, errs := s.askNodes(asking, ids)
	for i, id := range ids {
		_, seen.alive[id] = live[id]
		if errs[i] == nil {
			seen.alive[id] = true
			seen.tell(id, &answers[i])
		}
	}
	if c := seen.condition(groups); len(c.stuck) > 0 {
		return block.Errorf(block.Unavailable, "%d of %d groups have no majority (%s): `firn health` says why", len(c.stuck), c.all, nameGroups(c.stuck))
	}
	return nil
}
