package main

import (
	"context"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"firn.io/firn/cluster"
	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// adminAPI answers the command line.
type adminAPI struct {
	clusterpb.UnimplementedAdminServer
	*served
}

// serveAPI serves the admin API on l until stop is called.
func (s *served) serveAPI(l net.Listener, creds credentials.TransportCredentials, failed func(error)) (stop func()) {
	server := grpc.NewServer(grpc.Creds(creds), grpc.MaxRecvMsgSize(1<<20), grpc.UnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			answer, err := handle(ctx, req)
			return answer, toStatus(err)
		}))
	clusterpb.RegisterAdminServer(server, adminAPI{served: s})
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(l); err != nil {
			failed(block.Wrap(block.Unavailable, err, "admin API"))
		}
	}()
	return func() {
		server.Stop()
		<-done
	}
}

// CreateVolume implements clusterpb.AdminServer.
func (a adminAPI) CreateVolume(ctx context.Context, r *clusterpb.CreateVolumeRequest) (*clusterpb.Volume, error) {
	return a.one(ctx)(a.catalog.CreateVolume(ctx, meta.NewVolume{
		ID: block.NewUUID(), Name: r.Name, SizeBytes: r.SizeBytes, BlockSize: int(r.BlockSize), Replicas: int(r.Replicas),
	}))
}

// ListVolumes implements clusterpb.AdminServer.
func (a adminAPI) ListVolumes(ctx context.Context, _ *clusterpb.ListVolumesRequest) (*clusterpb.ListVolumesResponse, error) {
	volumes, err := a.volumes(ctx)
	if err == nil {
		err = a.measure(ctx, volumes...)
	}
	return &clusterpb.ListVolumesResponse{Volumes: volumes}, err
}

// ShowVolume implements clusterpb.AdminServer.
func (a adminAPI) ShowVolume(ctx context.Context, r *clusterpb.ShowVolumeRequest) (*clusterpb.Volume, error) {
	v, err := a.one(ctx)(meta.FindVolume(ctx, a.store, r.Name))
	if err == nil {
		err = a.measure(ctx, v)
	}
	return v, err
}

// SetVolume implements clusterpb.AdminServer.
func (a adminAPI) SetVolume(ctx context.Context, r *clusterpb.SetVolumeRequest) (*clusterpb.Volume, error) {
	if r.ReadOnly == nil {
		return nil, block.Errorf(block.Invalid, "no setting was given")
	}
	return a.one(ctx)(a.change(ctx, r.Name, cluster.Settings{ReadOnly: r.ReadOnly}))
}

// ResizeVolume implements clusterpb.AdminServer.
func (a adminAPI) ResizeVolume(ctx context.Context, r *clusterpb.ResizeVolumeRequest) (*clusterpb.Volume, error) {
	if r.SizeBytes <= 0 {
		return nil, block.Errorf(block.Invalid, "size %d: it must be above 0", r.SizeBytes)
	}
	if r.Shrink && !r.Force {
		if err := a.shrinkable(ctx, r.Name, r.SizeBytes); err != nil {
			return nil, err
		}
	}
	return a.one(ctx)(a.change(ctx, r.Name, cluster.Settings{SizeBytes: r.SizeBytes, Shrink: r.Shrink}))
}

// shrinkable refuses to take bytes away under clients: their file systems reach
// beyond the new end.
func (a adminAPI) shrinkable(ctx context.Context, name string, bytes int64) error {
	v, err := meta.FindVolume(ctx, a.store, name)
	if err != nil || bytes >= v.SizeBytes {
		return err
	}
	for _, o := range a.gateway.Volumes() {
		if o.Geometry.ID == v.ID && o.Clients > 0 {
			return block.Errorf(block.Busy, "volume %q has %d %s at gateway %s, and shrinking loses what lies beyond the new end under them: disconnect them first, or shrink with --force",
				v.Name, o.Clients, plural(o.Clients, "client"), a.id)
		}
	}
	return nil
}

// RenameVolume implements clusterpb.AdminServer.
func (a adminAPI) RenameVolume(ctx context.Context, r *clusterpb.RenameVolumeRequest) (*clusterpb.Volume, error) {
	if r.Name == r.NewName {
		return nil, block.Errorf(block.Exists, "volume %q has that name already", r.Name)
	}
	return a.one(ctx)(meta.RenameVolume(ctx, a.store, r.Name, r.NewName))
}

// RemoveVolume implements clusterpb.AdminServer.
func (a adminAPI) RemoveVolume(ctx context.Context, r *clusterpb.RemoveVolumeRequest) (*clusterpb.RemoveVolumeResponse, error) {
	v, err := meta.FindVolume(ctx, a.store, r.Name)
	if err != nil {
		return nil, err
	}
	meant := v.ID
	if r.Id != "" {
		if meant, err = block.ParseUUID(r.Id); err != nil {
			return nil, block.Wrap(block.Invalid, err, "id of the volume to remove")
		}
	}
	if meant != v.ID {
		return nil, block.Errorf(block.NotFound, "the name %q is that of another volume now, %s: volume %s was renamed or removed meanwhile", r.Name, v.ID, meant)
	}
	// A volume whose last client has left a moment ago need not be waited for.
	if err := a.gateway.Detach(ctx, v.ID, false); err != nil && block.KindOf(err) != block.NotFound {
		if block.KindOf(err) == block.Busy {
			return nil, block.Errorf(block.Busy, "volume %q is attached: it has clients at gateway %s; disconnect them first", r.Name, a.id)
		}
		return nil, err
	}
	_, err = meta.DeleteVolumeAs(ctx, a.store, r.Name, meant)
	return &clusterpb.RemoveVolumeResponse{}, err
}

// ListNodes implements clusterpb.AdminServer.
func (a adminAPI) ListNodes(ctx context.Context, _ *clusterpb.ListNodesRequest) (*clusterpb.ListNodesResponse, error) {
	nodes, err := a.nodes(ctx)
	if err == nil {
		a.addHealth(ctx, nodes)
	}
	return &clusterpb.ListNodesResponse{Nodes: nodes}, err
}

// Status implements clusterpb.AdminServer.
func (a adminAPI) Status(ctx context.Context, _ *clusterpb.StatusRequest) (*clusterpb.StatusResponse, error) {
	return a.status(ctx)
}

// Health implements clusterpb.AdminServer. It answers with what is wrong also
// when etcd is away: that is when it is asked.
func (a adminAPI) Health(ctx context.Context, _ *clusterpb.HealthRequest) (*clusterpb.HealthResponse, error) {
	s, err := a.status(ctx)
	if err != nil {
		return nil, err
	}
	return &clusterpb.HealthResponse{Healthy: judge(s.Problems).Healthy, Problems: s.Problems}, nil
}

// change changes settings of a volume through its owner (F8): this gateway, which
// attaches it for that.
func (s *served) change(ctx context.Context, name string, want cluster.Settings) (meta.VolumeMeta, error) {
	h, err := s.gateway.Open(ctx, name)
	if err != nil {
		return meta.VolumeMeta{}, err
	}
	defer h.Release()
	id := h.Geometry().ID
	return call(ctx, s.loop, func(done func(meta.VolumeMeta, error)) { s.catalog.client.StartSettings(ctx, id, want, done) }, nil)
}

// one makes the answer of what a call to the catalog returned.
func (a adminAPI) one(ctx context.Context) func(meta.VolumeMeta, error) (*clusterpb.Volume, error) {
	return func(v meta.VolumeMeta, err error) (*clusterpb.Volume, error) {
		if err != nil {
			return nil, err
		}
		owners, err := meta.ListOwners(ctx, a.store)
		if err != nil {
			return nil, err
		}
		return a.present(v, owners), nil
	}
}

func (s *served) present(v meta.VolumeMeta, owners map[block.VolumeID]meta.OwnerMeta) *clusterpb.Volume {
	out := &clusterpb.Volume{
		Name: v.Name, Id: v.ID.String(), SizeBytes: v.SizeBytes, BlockSize: uint32(v.BlockSize), Replicas: uint32(v.Replicas), ReadOnly: v.ReadOnly,
		State: string(v.State), Generation: uint32(v.Generation), Epoch: uint64(v.Epoch), AttachedTo: owners[v.ID].Gateway,
	}
	for _, g := range v.Groups() {
		out.Groups = append(out.Groups, uint64(g))
	}
	for _, o := range s.gateway.Volumes() {
		if o.Geometry.ID == v.ID {
			out.Clients = uint32(o.Clients)
		}
	}
	return out
}

func (s *served) volumes(ctx context.Context) ([]*clusterpb.Volume, error) {
	all, err := meta.ListVolumes(ctx, s.store)
	if err != nil {
		return nil, err
	}
	owners, err := meta.ListOwners(ctx, s.store)
	if err != nil {
		return nil, err
	}
	var out []*clusterpb.Volume
	for _, v := range all {
		if v.State != meta.Deleting {
			out = append(out, s.present(v, owners))
		}
	}
	return out, nil
}

// measure adds what volumes use, as far as the nodes tell.
func (s *served) measure(ctx context.Context, volumes ...*clusterpb.Volume) error {
	nodes, err := s.nodes(ctx)
	if err != nil {
		return err
	}
	w := s.addHealth(ctx, nodes)
	w.addUsage(volumes...)
	return nil
}

// gateways are those that hold their leases.
func (s *served) gateways(ctx context.Context) (out []*clusterpb.Gateway, err error) {
	all, err := meta.ListGateways(ctx, s.store)
	for _, g := range all {
		out = append(out, &clusterpb.Gateway{Id: g.ID, ApiAddr: g.Addr, NbdAddr: g.NBD, IscsiAddr: g.ISCSI})
	}
	return out, err
}

func (s *served) nodes(ctx context.Context) ([]*clusterpb.Node, error) {
	all, err := meta.ListNodes(ctx, s.store)
	if err != nil {
		return nil, err
	}
	live, err := meta.ListLive(ctx, s.store)
	if err != nil {
		return nil, err
	}
	var out []*clusterpb.Node
	for _, n := range all {
		_, alive := live[n.ID]
		v := &clusterpb.Node{Id: uint32(n.ID), Addr: n.Addr, Zone: n.Zone, Alive: alive}
		for _, d := range n.Disks {
			if !d.Absent {
				v.Disks = append(v.Disks, &clusterpb.Disk{Id: d.ID.String(), CapacityBytes: d.CapacityBytes, Failed: d.Failed})
			}
		}
		out = append(out, v)
	}
	return out, nil
}

// status tells what etcd knows or, while it does not answer, what this gateway
// has attached, and that.
func (s *served) status(ctx context.Context) (*clusterpb.StatusResponse, error) {
	asking, cancel := context.WithTimeout(ctx, statusTime)
	defer cancel()
	st, err := s.statusOfCluster(asking)
	if err == nil || block.KindOf(err) != block.Unavailable {
		return st, err
	}
	st = s.statusHere()
	st.Partial = true
	st.Problems = append(st.Problems, &clusterpb.Problem{
		Severity: "error", What: err.Error(), Remedy: "attached volumes go on; attaching and changing volumes waits until etcd answers",
	})
	for _, o := range s.gateway.Volumes() {
		g := o.Geometry
		st.Volumes = append(st.Volumes, &clusterpb.Volume{Name: g.Name, Id: g.ID.String(), SizeBytes: g.SizeBytes, BlockSize: uint32(g.LogicalBlockBytes),
			ReadOnly: g.ReadOnly, State: string(meta.Ready), AttachedTo: s.id, Clients: uint32(o.Clients)})
	}
	return st, nil
}

// statusTime bounds what etcd is asked for a status, so that its absence is told
// before whoever asked has given up.
const statusTime = 2 * time.Second

func (s *served) statusHere() *clusterpb.StatusResponse {
	return &clusterpb.StatusResponse{ClusterId: s.cluster.String(), Version: version(), Gateway: s.id, NbdAddr: s.nbdAddr}
}

func (s *served) statusOfCluster(ctx context.Context) (*clusterpb.StatusResponse, error) {
	st := s.statusHere()
	groups, err := meta.ListGroups(ctx, s.store)
	if err != nil {
		return nil, err
	}
	nodes, w, c, err := s.wellness(ctx, groups)
	if err != nil {
		return nil, err
	}
	st.Nodes = nodes
	if st.Volumes, err = s.volumes(ctx); err != nil {
		return nil, err
	}
	w.addUsage(st.Volumes...)
	if st.Gateways, err = s.gateways(ctx); err != nil {
		return nil, err
	}
	st.Groups, st.Repairs = uint32(len(groups)), repairsOf(groups, w.copies)
	st.DegradedGroups, st.StuckGroups = uint32(len(c.degraded)), uint32(len(c.stuck))
	st.Problems = append(nodeProblems(st.Nodes), groupProblems(groups, st.Nodes, w.served)...)
	st.Problems = append(st.Problems, w.problems...)
	return st, nil
}

func nodeProblems(nodes []*clusterpb.Node) (out []*clusterpb.Problem) {
	if len(nodes) == 0 {
		out = append(out, &clusterpb.Problem{Severity: "error", What: "there is no storage node", Remedy: "start one with `firn node`"})
	}
	for _, n := range nodes {
		if !n.Alive {
			out = append(out, &clusterpb.Problem{Severity: "error", What: fmt.Sprintf("node %d at %s is down", n.Id, n.Addr),
				Remedy: "start it again with the same --id and --disk; it catches up by itself"})
		}
		for _, d := range n.Disks {
			if d.Failed {
				what := fmt.Sprintf("disk %s of node %d has failed", d.Id, n.Id)
				if d.State == wire.DiskFailed.String() {
					what += ": " + d.Reason
				}
				out = append(out, &clusterpb.Problem{Severity: "error", What: what,
					Remedy: "do what it says, or replace it; a disk that failed a sync is not used again"})
			}
		}
	}
	return out
}
