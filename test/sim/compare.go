package sim

import (
	"fmt"
	"strings"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/internal/block"
)

// compare waits until all replicas have applied the same, and checks that they
// show the same, that what they show is live on their disks, and that nothing
// keeps what it should let go.
func (c *Cluster) compare(r *Report) error {
	if !c.runUntil(settleLimit, c.settled) {
		return fmt.Errorf("progress: the replicas do not come together within %v\n%s", settleLimit, c.state())
	}
	first := map[block.GroupID]node.Digest{}
	for _, s := range c.nodes {
		digests, err := s.node.Digests()
		if err != nil {
			return fmt.Errorf("%s: digest: %w", nodeName(s.id), err)
		}
		for _, d := range digests {
			if s == c.victim && s.halted(d.Group) {
				continue
			}
			other, known := first[d.Group]
			if !known {
				first[d.Group] = d
				continue
			}
			r.Digests++
			if other != d {
				return fmt.Errorf("digests: group %d shows %016x at %v on %s, and %016x at %v elsewhere", d.Group, d.Sum, d.Applied, nodeName(s.id), other.Sum, other.Applied)
			}
		}
	}
	// What was overwritten and hidden is let go of by checkpoints and the reaper.
	var readable, live int64
	var err error
	let := func() bool {
		readable, live, err = c.live()
		return err != nil || readable == live
	}
	for range int(settleLimit / time.Second) {
		if let() {
			break
		}
		c.runFor(time.Second)
	}
	r.Readable, r.Live = readable, live
	if err == nil && readable != live {
		err = fmt.Errorf("live bits: %d blocks are live and only %d can be read, %v after the last write\n%s", live, readable, settleLimit, c.state())
	}
	if err != nil {
		return err
	}
	for _, s := range c.nodes {
		if s == c.victim && s.rotten {
			continue
		}
		read, err := s.node.CheckBlocks(largestVolume / block.ChunkBytes)
		if err != nil {
			return fmt.Errorf("blocks: %s: %w", nodeName(s.id), err)
		}
		r.Read += read
	}
	return nil
}

// groupsNow is what the metadata store says of the groups.
func (c *Cluster) groupsNow() []meta.GroupMeta {
	gs, err := meta.ListGroups(c.ctx, c.Meta.Client())
	if err != nil {
		c.fail(err)
	}
	return gs
}

// live counts over all nodes and checks that what can be read is live.
func (c *Cluster) live() (readable, live int64, err error) {
	const chunks = block.Chunk(largestVolume / block.ChunkBytes)
	for _, s := range c.nodes {
		r, l, err := s.node.CheckLive(chunks)
		if err != nil {
			return 0, 0, fmt.Errorf("live bits: %s: %w", nodeName(s.id), err)
		}
		readable, live = readable+r, live+l
	}
	return readable, live, nil
}

// settled tells whether all nodes are up and all replicas of each group have
// applied the same entries.
func (c *Cluster) settled() bool {
	applied := map[block.GroupID]uint64{}
	for _, s := range c.nodes {
		if !s.running() || !s.node.Ready() {
			return false
		}
		for _, r := range s.node.Status().Replicas {
			if s == c.victim && r.Failed != "" {
				continue
			}
			if !r.Open || r.Failed != "" {
				return false
			}
			if was, known := applied[r.Group]; known && was != r.Applied {
				return false
			}
			applied[r.Group] = r.Applied
		}
	}
	return true
}

// halted tells whether a replica does nothing any more.
func (s *storage) halted(g block.GroupID) bool {
	for _, r := range s.node.Status().Replicas {
		if r.Group == g {
			return r.Failed != ""
		}
	}
	return false
}

// state describes the nodes, for a run that is stuck.
func (c *Cluster) state() string {
	var b strings.Builder
	for _, s := range c.nodes {
		if !s.running() {
			fmt.Fprintf(&b, "%s is down\n", nodeName(s.id))
			continue
		}
		st := s.node.Status()
		fmt.Fprintf(&b, "%s: registered %v, lease %v, counters %+v\n", nodeName(s.id), st.Registered, st.Lease, st.Counters)
		for _, d := range st.Disks {
			fmt.Fprintf(&b, "  disk %+v\n", d)
		}
		for _, r := range st.Replicas {
			fmt.Fprintf(&b, "  group %d replica %d: open %v %s, leads %v, leader %d, term %d, applied %d of %d, durable %d, log %d..%d\n", r.Group, r.Replica,
				r.Open, r.Failed, r.Leading, r.Leader, r.Term, r.Applied, r.Committed, r.DurablyApplied, r.LogFirst, r.LogLast)
		}
	}
	return b.String()
}
