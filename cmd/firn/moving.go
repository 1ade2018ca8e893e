package main

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/gateway"
	"firn.io/firn/internal/block"
	"firn.io/firn/nbd"
)

const (
	// yieldTime is how long a gateway does not attach a volume that was taken
	// from it by force: the clients that were cut off come back at once, and
	// would take it again before those for whom it was moved.
	yieldTime = 5 * time.Second
	// askOwnerTime bounds the question to the gateway that has a volume.
	askOwnerTime = 5 * time.Second
)

// yielded are the volumes that are not to be attached here until some time.
type yielded struct {
	mu    sync.Mutex
	until map[block.VolumeID]time.Time
	names map[block.VolumeID]string
}

func (y *yielded) add(id block.VolumeID, name string) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.until == nil {
		y.until, y.names = map[block.VolumeID]time.Time{}, map[block.VolumeID]string{}
	}
	now := time.Now()
	for v, end := range y.until {
		if now.After(end) {
			delete(y.until, v)
			delete(y.names, v)
		}
	}
	y.until[id], y.names[id] = now.Add(yieldTime), name
}

// check refuses a volume that was given away a moment ago.
func (y *yielded) check(id block.VolumeID) error {
	y.mu.Lock()
	defer y.mu.Unlock()
	if left := time.Until(y.until[id]); left > 0 {
		return block.Errorf(block.Busy, "volume %q was detached from this gateway by force: it attaches the volume again in %d s, if no other has it then",
			y.names[id], int(left/time.Second)+1)
	}
	return nil
}

// DetachVolume implements clusterpb.AdminServer (F3, F6). The owner itself is
// asked first, wherever it is: it knows its clients, and what it gives back is
// free at once. Only one that does not answer is removed.
func (a adminAPI) DetachVolume(ctx context.Context, r *clusterpb.DetachVolumeRequest) (*clusterpb.DetachVolumeResponse, error) {
	v, err := meta.FindVolume(ctx, a.store, r.Name)
	if err != nil {
		return nil, err
	}
	owners, err := meta.ListOwners(ctx, a.store)
	if err != nil {
		return nil, err
	}
	owner, attached := owners[v.ID]
	if !attached {
		return &clusterpb.DetachVolumeResponse{}, nil
	}
	out := &clusterpb.DetachVolumeResponse{Gateway: owner.Gateway}
	switch {
	case owner.Gateway == a.id:
		err = a.detachHere(ctx, v, r.Force)
	case r.Forwarded:
		return nil, block.Errorf(block.Busy, "volume %q went to gateway %q meanwhile; try again", v.Name, owner.Gateway)
	default:
		err = a.askOwner(ctx, owner.Gateway, r)
	}
	if !errors.Is(err, block.Unavailable) && !errors.Is(err, block.NotFound) {
		return out, err
	}
	if !r.Force {
		return nil, block.Errorf(block.Busy, "volume %q is attached to gateway %q, which does not answer: if that is dead, its claim ends within %v by itself; --force ends it now (%v)",
			v.Name, owner.Gateway, meta.OwnerTTL, err)
	}
	slog.Warn("owner is removed by force", "volume", v.Name, "gateway", owner.Gateway, "why", err)
	if _, err := meta.ForceOwner(ctx, a.store, v.ID); err != nil && block.KindOf(err) != block.NotFound {
		return nil, err
	}
	out.Removed = true
	return out, nil
}

// detachHere ends the attachment at this gateway. With force its clients are
// cut off first, so that none of them is told of an error.
func (s *served) detachHere(ctx context.Context, v meta.VolumeMeta, force bool) error {
	if force {
		s.yielded.add(v.ID, v.Name)
		// By its id: it may have been renamed since they entered.
		cut, err := s.nbd.Disconnect(ctx, func(_ nbd.Client, export nbd.Info) bool { return export.ID == v.ID.String() })
		sessions, sessionsErr := s.targets.disconnect(ctx, v.ID)
		if err := errors.Join(err, sessionsErr); err != nil {
			slog.Warn("clients were cut off with requests in flight", "volume", v.Name, "err", err)
		}
		slog.Info("volume is given away", "volume", v.Name, "connections", cut, "sessions", sessions)
	}
	err := s.gateway.Detach(ctx, v.ID, force)
	if errors.Is(err, block.Busy) {
		clients := 0
		for _, o := range s.gateway.Volumes() {
			if o.Geometry.ID == v.ID {
				clients = o.Clients
			}
		}
		return block.Errorf(block.Busy, "volume %q has %d %s at gateway %q: disconnect them, or cut them off with --force", v.Name, clients, plural(clients, "client"), s.id)
	}
	return err
}

// askOwner passes the request on to the gateway that has the volume.
// Unavailable: it does not answer.
func (s *served) askOwner(ctx context.Context, id string, r *clusterpb.DetachVolumeRequest) error {
	all, err := meta.ListGateways(ctx, s.store)
	if err != nil {
		return err
	}
	for _, g := range all {
		if g.ID != id {
			continue
		}
		conn, err := grpc.NewClient(g.Addr, grpc.WithTransportCredentials(s.creds))
		if err != nil {
			return block.Wrap(block.Unavailable, err, "API of gateway %q at %s", id, g.Addr)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(ctx, askOwnerTime)
		defer cancel()
		_, err = clusterpb.NewAdminClient(conn).DetachVolume(ctx, &clusterpb.DetachVolumeRequest{Name: r.Name, Force: r.Force, Forwarded: true})
		if err = fromStatus(err, g.Addr); errors.Is(err, block.Unavailable) {
			return block.Errorf(block.Unavailable, "no answer from %s", g.Addr)
		}
		return err
	}
	return block.Errorf(block.Unavailable, "gateway %q is not registered", id)
}

// attach is gateway.Storage's Attach, but for volumes that were just given away.
func (y *yielded) attach(then func(context.Context, block.VolumeID) (gateway.Backend, error)) func(context.Context, block.VolumeID) (gateway.Backend, error) {
	return func(ctx context.Context, id block.VolumeID) (gateway.Backend, error) {
		if err := y.check(id); err != nil {
			return nil, err
		}
		return then(ctx, id)
	}
}
