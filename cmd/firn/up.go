package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/transport/grpc"
	"firn.io/firn/cluster/transport/inproc"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
)

// upState is what the folder of `firn up` says of itself: up.json.
type upState struct {
	Format int `json:"format"`
	// Nodes is how many node folders there are.
	Nodes int `json:"nodes"`
	// Folder identifies it in owner keys (F3).
	Folder string `json:"folder"`
}

const (
	upFormat   = 1
	upName     = "up.json"
	maxUpBytes = 64 << 10
	// maxUpNodes bounds --nodes: more of them on one machine show nothing new.
	maxUpNodes = 16
)

// openUpState reads up.json, or makes what it is to say, with nodes, if they have
// grown: save keeps that. nodes 0 asks for as many as there are, or one.
func openUpState(disk vfs.FS, dir string, nodes int) (upState, error) {
	path := filepath.Join(dir, upName)
	s := upState{Format: upFormat}
	text, err := vfs.ReadFile(disk, path, maxUpBytes)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s.Folder = block.FormatUUID(block.NewUUID())
	case err != nil:
		return s, err
	default:
		if err := json.Unmarshal(text, &s); err != nil || s.Nodes < 1 {
			return s, block.Errorf(block.Corrupt, "%s does not say how many nodes there are: %v", path, err)
		}
		if s.Format > upFormat {
			return s, block.Errorf(block.Unsupported, "%s was written by a newer firn (format %d)", path, s.Format)
		}
	}
	if nodes == 0 {
		nodes = max(1, s.Nodes)
	}
	if nodes < s.Nodes {
		return s, block.Errorf(block.Invalid, "the folder %s holds %d nodes, --nodes %d would leave some of their data behind; give --nodes %d, or nothing", dir, s.Nodes, nodes, s.Nodes)
	}
	s.Nodes = nodes
	return s, nil
}

// save writes up.json, durably. That is when all nodes can be opened, for fewer are
// refused from then on, and before one of them joins the cluster and is given data.
func (s upState) save(disk vfs.FS, dir string) error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return vfs.WriteFileAtomic(disk, filepath.Join(dir, upName), append(text, '\n'))
}

// folderID identifies a data folder in owner keys.
func folderID(dir string) (string, error) {
	disk := vfs.NewOS()
	path := filepath.Join(dir, "folder.id")
	text, err := vfs.ReadFile(disk, path, maxUpBytes)
	if errors.Is(err, fs.ErrNotExist) {
		text = []byte(block.FormatUUID(block.NewUUID()))
		err = vfs.WriteFileAtomic(disk, path, text)
	}
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(string(text))
	if _, err := block.ParseUUID(id); err != nil {
		return "", block.Wrap(block.Corrupt, err, "%s", path)
	}
	return id, nil
}

// wanted is a --volume NAME=SIZE.
type wanted struct {
	name  string
	bytes int64
}

func parseWanted(texts []string) ([]wanted, error) {
	var out []wanted
	for _, text := range texts {
		name, sizeText, ok := strings.Cut(text, "=")
		if !ok {
			return nil, block.Errorf(block.Invalid, "--volume %q: write it as NAME=SIZE, such as demo=10G", text)
		}
		if err := meta.CheckVolumeName(name); err != nil {
			return nil, block.Wrap(block.Invalid, err, "--volume %s", text)
		}
		n, err := parseSize(sizeText)
		if err == nil {
			err = meta.CheckSize(n, 512)
		}
		if err != nil {
			return nil, block.Wrap(block.Invalid, err, "--volume %s", text)
		}
		for _, w := range out {
			if w.name == name {
				return nil, block.Errorf(block.Invalid, "--volume %s: %s is asked for twice", text, name)
			}
		}
		out = append(out, wanted{name, n})
	}
	return out, nil
}

type upFlags struct {
	data     string
	nodes    int
	capacity size
	volumes  []string
	wire     bool
	logLevel string
	fronts   frontFlags
}

func newUp(c *console) *cobra.Command {
	var flags upFlags
	cmd := &cobra.Command{
		Use: "up", Short: "Run everything in one process: etcd, storage nodes and a gateway", Args: cobra.NoArgs,
		Example: "  firn up --volume demo=10G\n  firn up --nodes 3 --data /srv/firn --volume vm1=100G --volume vm2=100G",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := startLog(c, flags.logLevel); err != nil {
				return err
			}
			if err := flags.fronts.check(); err != nil {
				return err
			}
			volumes, err := parseWanted(flags.volumes)
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("nodes") && (flags.nodes < 1 || flags.nodes > maxUpNodes) {
				return block.Errorf(block.Invalid, "--nodes %d: use 1 to %d", flags.nodes, maxUpNodes)
			}
			return serveUntil(cmd.Context(), func(ctx context.Context, parts *stack, failed func(error)) error {
				return flags.open(ctx, c, volumes, parts, failed)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&flags.data, "data", "./firn-data", "folder for everything")
	f.IntVar(&flags.nodes, "nodes", 0, "storage nodes, each with a folder of its own (default 1, or as many as there are)")
	f.Var(&flags.capacity, "capacity", "how much each node may fill (default: most of what is free, shared equally)")
	f.StringArrayVar(&flags.volumes, "volume", nil, "NAME=SIZE: create this volume if it is missing; may be repeated")
	f.BoolVar(&flags.wire, "wire", false, "let nodes and gateway talk by gRPC over loopback instead of in memory")
	flags.fronts.register(cmd)
	logFlag(cmd, &flags.logLevel, "warn")
	return cmd
}

// open starts everything in its order. What it opened is on parts also when it fails.
func (u *upFlags) open(ctx context.Context, c *console, volumes []wanted, parts *stack, failed func(error)) error {
	disk := vfs.NewOS()
	listeners, err := u.claim(ctx, disk, parts)
	if err != nil {
		return err
	}
	state, err := openUpState(disk, u.data, u.nodes)
	if err != nil {
		return err
	}
	etcd, err := startEtcd(ctx, filepath.Join(u.data, "etcd"))
	if err != nil {
		return err
	}
	parts.push("etcd", func(context.Context) error { etcd.Close(); return nil })
	clusterMeta, err := meta.InitCluster(ctx, etcd.store, block.NewUUID())
	if err != nil {
		return err
	}

	fabric := inproc.NewFabric(nil)
	network := func(l loop.Loop, id transport.Identity, name string) transport.Network {
		if u.wire {
			return grpc.New(grpc.Options{Loop: l, Identity: id})
		}
		return fabric.Network(name, l, id)
	}
	metrics := listeners.page.metrics
	var nodes []*storage
	all := func(holds func(*storage, context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			for _, n := range nodes {
				if err := holds(n, ctx); err != nil {
					return err
				}
			}
			return nil
		}
	}
	config := func(i int) storageConfig {
		listen := fmt.Sprintf("node-%d", i)
		if u.wire {
			listen = "127.0.0.1:0"
		}
		return storageConfig{
			id: block.NodeID(i), cluster: clusterMeta.ID, listen: listen, store: etcd.store, network: network, metrics: metrics,
			disks: []node.DiskConfig{{Dir: filepath.Join(u.data, fmt.Sprintf("node-%d", i)), CapacityBytes: int64(u.capacity), Sharing: state.Nodes}},
		}
	}
	for i := 1; i <= state.Nodes; i++ {
		n, err := openStorage(ctx, config(i), parts)
		if err != nil {
			return err
		}
		nodes = append(nodes, n)
	}
	if err := state.save(disk, u.data); err != nil {
		return err
	}
	for i, n := range nodes {
		if err := n.start(ctx, config(i+1), parts); err != nil {
			return err
		}
	}
	starting, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	if err := c.waiting(starting, "starting", func(ctx context.Context) error { return awaitReady(ctx, all((*storage).started)) }); err != nil {
		return err
	}
	s, err := openGateway(ctx, gatewayConfig{
		id: "up", cluster: clusterMeta.ID, folder: state.Folder, store: etcd.store, network: network, fronts: listeners, metrics: metrics, ready: all((*storage).ready),
	}, parts, failed)
	if err != nil {
		return err
	}
	if err := c.waiting(starting, "creating volumes", func(ctx context.Context) error { return s.ensure(ctx, c, volumes) }); err != nil {
		return err
	}
	return s.announce(ctx, c, u.data, state.Nodes, listeners)
}

// claim takes the ports and the folder. Who has the folder is more to a person than
// who has the ports; but a folder that is not there is made only when nothing is
// wrong with them.
func (u *upFlags) claim(ctx context.Context, disk vfs.FS, parts *stack) (listeners *fronts, err error) {
	take := func() error {
		lock, err := lockFolder(ctx, disk, u.data)
		if err == nil {
			parts.push("data folder", func(context.Context) error { return lock.Close() })
		}
		return err
	}
	if _, missing := os.Stat(u.data); !errors.Is(missing, fs.ErrNotExist) {
		if err := take(); err != nil {
			return nil, err
		}
		return u.fronts.listen(ctx, parts)
	}
	if listeners, err = u.fronts.listen(ctx, parts); err != nil {
		return nil, err
	}
	return listeners, take()
}

// ensure creates the volumes that are missing. One that is there keeps its
// size; if that is not the one asked for, a person is told.
func (s *served) ensure(ctx context.Context, c *console, volumes []wanted) error {
	for _, w := range volumes {
		v, err := meta.FindVolume(ctx, s.store, w.name)
		if err == nil {
			if v.SizeBytes != w.bytes {
				fmt.Fprintf(c.err, "firn: volume %s is there with %s and keeps that; `firn volume resize` changes it\n", w.name, formatSize(v.SizeBytes))
			}
			continue
		}
		if block.KindOf(err) != block.NotFound {
			return err
		}
		if _, err := s.catalog.CreateVolume(ctx, meta.NewVolume{ID: block.NewUUID(), Name: w.name, SizeBytes: w.bytes}); err != nil {
			return err
		}
	}
	return nil
}

func (s *served) announce(ctx context.Context, c *console, dir string, nodes int, listeners *fronts) error {
	all, err := s.volumes(ctx)
	if err != nil {
		return err
	}
	v := listeners.view(s.cluster)
	v.Volumes = viewVolumes(all)
	return c.print(v, func(w io.Writer) {
		fmt.Fprintf(w, "firn up: %d %s, data in %s\n\n", nodes, plural(nodes, "node"), dir)
		listeners.write(w, v)
		if len(v.Volumes) == 0 {
			fmt.Fprintf(w, "\nno volumes yet: firn volume create demo 10G\n")
		}
		fmt.Fprintln(w, "\nready; Ctrl-C stops")
	})
}
