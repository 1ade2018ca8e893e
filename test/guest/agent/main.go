// Command agent runs in a guest of package guest: it takes commands from the
// host over a virtio serial port, runs them in a shell, and sends back what they
// print and how they end. When the host is gone it turns the guest off.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"firn.io/firn/test/guest/agent/line"
)

func main() {
	err := serve("/dev/virtio-ports/agent")
	fmt.Fprintln(os.Stderr, "agent:", err)
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Fprintln(os.Stderr, "agent: power off:", err)
	}
}

// port is the host's end; lines of several commands leave it whole.
type port struct {
	mu sync.Mutex
	w  io.Writer
}

func (p *port) send(a line.Answer) error {
	text, err := json.Marshal(a)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	_, err = p.w.Write(append(text, '\n'))
	return err
}

func serve(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	p := &port{w: f}
	if err := p.send(line.Answer{Ready: true}); err != nil {
		return err
	}
	in := bufio.NewScanner(f)
	in.Buffer(nil, line.MaxBytes)
	for in.Scan() {
		var c line.Command
		if err := json.Unmarshal(in.Bytes(), &c); err != nil {
			return err
		}
		go func() {
			if err := run(p, c); err != nil {
				fmt.Fprintln(os.Stderr, "agent:", err)
			}
		}()
	}
	return cmpError(in.Err(), errors.New("the host is gone"))
}

func cmpError(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// run runs one command and tells of it as it goes.
func run(p *port, c line.Command) error {
	cmd := exec.Command("/bin/sh", "-c", c.Script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		return p.send(line.Answer{ID: c.ID, Output: err.Error(), Ended: true, Exit: 127})
	}
	// Not every holder of the pipe ends with the command: a daemon that it
	// started may print later, and nobody waits for that.
	printed := make(chan error, 1)
	go func() { printed <- forward(p, c.ID, r) }()
	err = cmd.Wait()
	if cmd.ProcessState == nil {
		return err
	}
	exit := cmd.ProcessState.ExitCode()
	if exit < 0 {
		exit = 128 + int(cmd.ProcessState.Sys().(syscall.WaitStatus).Signal())
	}
	if err := r.SetReadDeadline(pipeGrace()); err != nil {
		return err
	}
	if err := <-printed; err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return p.send(line.Answer{ID: c.ID, Ended: true, Exit: exit})
}

// forward sends what r yields until it ends.
func forward(p *port, id int, r io.Reader) error {
	buf := make([]byte, 16<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if err := p.send(line.Answer{ID: id, Output: string(buf[:n])}); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}
